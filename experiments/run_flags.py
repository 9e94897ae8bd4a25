"""The flags that training programs share."""

from absl import flags

from varedit_jax import command
from varedit_jax.training.profile import parse_steps
from varedit_jax.training.trainer import Launch
from varedit_jax.weights.directory import STORED_TYPES

WORKDIR = command.DEFINE_path("workdir", None, "directory of the run: checkpoints, metrics, images", required=True)
_RESUME = flags.DEFINE_enum(
    "resume", "auto", ["auto", "yes", "no"], "yes: only resume; no: only start a new run; auto: resume if possible"
)
_STOP_AFTER = flags.DEFINE_integer(
    "stop_after", None, "save and end after this many steps of this process", lower_bound=1
)
_PROFILE_STEPS = flags.DEFINE_string("profile_steps", "", "A:B traces steps A to B - 1 into WORKDIR/profile")
_DUMP_STEP = flags.DEFINE_integer(
    "dump_step", None, "a step whose state and batch are written to WORKDIR/replay, for --replay", lower_bound=0
)
EXPORT = command.DEFINE_path("export", "", "new directory for the finished weights")
EXPORT_TYPE = flags.DEFINE_enum("export_type", "float16", list(STORED_TYPES), "type of exported weights")


def launch() -> Launch:
    """Returns the settings of this process from its flags. Raises UserError for a malformed flag."""
    return Launch(
        workdir=WORKDIR.value,
        resume={"auto": None, "yes": True, "no": False}[_RESUME.value],
        stop_after=_STOP_AFTER.value,
        profile_steps=parse_steps(_PROFILE_STEPS.value),
        dump_step=_DUMP_STEP.value,
    )
