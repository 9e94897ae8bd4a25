"""Checks this implementation against golden data of the published release, number by number.

    python -m experiments.check_parity --golden=tests/data/golden/mini_a

Prints the largest absolute error of every tensor; the exit code is 1 if one exceeds its tolerance.
"""

import jax

from experiments import program
from varedit_jax import command
from varedit_jax.analysis import parity
from varedit_jax.errors import UserError

_GOLDEN = command.DEFINE_path(
    "golden", None, "directory with config.json, state dicts and golden.safetensors", required=True
)


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    jax.config.update("jax_default_matmul_precision", "highest")  # the golden data is float32 throughout
    golden = parity.read_golden(_GOLDEN.value)
    print(f"{'tensor':<24} {'largest error':>14} {'tolerance':>10}")

    def show(row: parity.ParityRow) -> None:
        print(
            f"{row.name:<24} {row.error:>14.3g} {row.tolerance:>10.0e}  {'ok' if row.passed else 'BEYOND'}", flush=True
        )

    rows = parity.compare(golden, show)
    beyond = [row.name for row in rows if not row.passed]
    if beyond:
        raise UserError(f"{len(beyond)} of {len(rows)} tensors are beyond tolerance: {', '.join(beyond)}")
    print(f"all {len(rows)} tensors are inside tolerance")


if __name__ == "__main__":
    program.run(main)
