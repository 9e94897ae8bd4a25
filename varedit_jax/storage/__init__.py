"""Storage of any kind: a path is a local directory, gs:// or s3://, wherever the project takes one.

    paths.py    text of a user -> path; what lies in a directory; TensorStore's specs
    files.py    a file or a directory is replaced at once or not at all
    jsonl.py    append-only JSON lines
    disk.py     full disks, room, and errors that are the machine's and not the data's
    lock.py     one run per directory
    orbax.py    Orbax on what it does not know by itself

Local paths are pathlib.Path, those of an object store epath.Path, which has the same methods as far as they are used
here. No other module makes a path of a user's text.
"""
