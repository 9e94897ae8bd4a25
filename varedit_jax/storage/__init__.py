"""Storage of any kind: a path is a local directory, gs:// or s3://, wherever the project takes one.

    paths.py    a user's text -> path; contents of directories; TensorStore's specs
    files.py    atomic replacement of files and directories
    jsonl.py    append-only JSON lines
    disk.py     full disks, free space, and errors of the machine as opposed to damaged data
    lock.py     one run per directory
    orbax.py    Orbax on object stores
    pointers.py    what a file is instead of what its name says

Local paths are pathlib.Path, those of an object store epath.Path, which has all methods that are used here. No other
module turns a user's text into a path.
"""
