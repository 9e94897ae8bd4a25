"""Any prepared TFDS data set, by feature names.

The options `source`, `target`, `instruction`, `mask`, `kind` and `id` name features (`a/b` for nested ones), by default
those of the same name; `split` is `train` by default. Images are read as stored, without decoding. The data set's own
code is not needed, but its file format must support random access, such as `array_record`.
"""

import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence

from tensorflow_datasets.proto import tf_example_pb2

from data_pipelines.quiet_tfds import tfds
from data_pipelines.reasons import Reason
from data_pipelines.sources.entries import Entry, Part, Refused, SourceFormat, make_entry
from data_pipelines.sources.files import ReadError, find
from varedit_jax.errors import UserError
from varedit_jax.storage.paths import local

_NAME = "tfds"
_FAILED_CALL = re.compile(r"\w+\(\) failed: ")  # ArrayRecord: "open() failed: Too many open files; opening ..."
_EXAMPLES = 4096  # per part
_FIELDS = ("source", "target", "instruction", "mask", "kind", "id")


def _builder(directory: str) -> tfds.core.DatasetBuilder:
    return tfds.builder_from_directory(directory)


def _parts(inputs: Sequence[str], options: Mapping[str, str]) -> list[Part]:
    directories = [posixpath.dirname(file) for file in find(inputs, "dataset_info.json", any_split=True)]
    for directory in directories:
        local(directory, "a prepared TFDS data set")
    if not directories:
        raise UserError(
            f"there is no dataset_info.json under {', '.join(inputs)}; "
            f"give the directory of a prepared data set, NAME/VERSION"
        )
    split = options.get("split") or "train"
    parts = []
    for directory in directories:
        builder = _builder(directory)
        if split not in builder.info.splits:
            raise UserError(f"{directory} has no split {split!r}; it has {', '.join(builder.info.splits)}")
        count = builder.info.splits[split].num_examples
        for start in range(0, count, _EXAMPLES):
            span = {"split": split, "start": str(start), "stop": str(min(start + _EXAMPLES, count))}
            name = f"{builder.name}/{split}/{start:09d}"
            parts.append(Part(source=_NAME, name=name, files=(directory,), options={**options, **span}))
    return parts


def _read(part: Part) -> Iterator[Entry]:
    builder = _builder(part.files[0])
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    try:
        source = builder.as_data_source(part.options["split"], deserialize_method=raw)
    except NotImplementedError as error:
        raise UserError(f"{part.files[0]} can only be read in order; prepare it as array_record: {error}") from error
    features = {field: part.options.get(field, field) for field in _FIELDS}
    for index in range(int(part.options["start"]), int(part.options["stop"])):
        id = f"{part.options['split']}/{index}"
        try:
            example = tf_example_pb2.Example.FromString(source[index])
        except Exception as error:  # ArrayRecord and protobuf have their own exceptions for damaged bytes
            if _FAILED_CALL.match(str(error)):
                raise ReadError(f"cannot read {part.files[0]}: {error}; run the same command again") from error
            detail = str(error)[:200]
            yield Refused(id=id, dataset=builder.name, reason=Reason.ARCHIVE, detail=detail)
            continue
        stored = example.features.feature
        values = {
            field: stored[name].bytes_list.value[0] if name in stored and stored[name].bytes_list.value else b""
            for field, name in features.items()
        }
        for field in ("source", "target", "instruction"):
            if features[field] not in stored:
                raise UserError(
                    f"{builder.name} has no feature {features[field]!r}, but {', '.join(sorted(stored))}; "
                    f"say which one is the {field} with {field}=NAME"
                )
        yield make_entry(
            id=values["id"].decode("utf-8", "replace") or id,
            dataset=builder.name,
            source=values["source"],
            target=values["target"],
            instructions=[values["instruction"].decode("utf-8", "replace")],
            kind=values["kind"].decode("utf-8", "replace"),
            mask=values["mask"] or None,
        )


SOURCE = SourceFormat(name=_NAME, license="", parts=_parts, read=_read, options=(*_FIELDS, "split"))
