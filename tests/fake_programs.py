"""Programs of a machine that is not there, such as those of SLURM."""


def put(folder, name, text):
    """A program of this name, which a shell runs."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)
    return folder
