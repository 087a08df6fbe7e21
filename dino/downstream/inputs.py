"""The pictures of `--input`, and where what is drawn over each goes."""

from collections.abc import Sequence
from pathlib import Path

from dino.attention.inputs import Input, find_inputs, printable
from dino.runtime.options import UserError


def pictures_to_see(
    places: Sequence[str], output_dir: Path, endings: tuple[str, ...]
) -> list[tuple[Input, Path]]:
    """Each picture, and the path of its outputs but for their endings; what is none is said and left out.

    Args:
        places: files, folders, patterns.
        endings: of what an earlier run has drawn, which is not drawn over.

    Raises:
        UserError: there is no picture.
    """
    everything = find_inputs(places, output_dir)
    others = [each for each in everything if each.kind != "picture"]
    found = [each for each in everything if each.kind == "picture" and not each.name.endswith(endings)]
    if not found and others:
        raise UserError(f"--input {others[0].place}: pictures are needed, and this is a {others[0].kind}")
    if not found:
        raise UserError(f"--input {' '.join(places)}: there are only outputs of this command")
    for each in others:
        print(f"left out: {printable(each.name)}, a {each.kind}")
    alone = len(found) == 1 and found[0].folder == output_dir
    stems = [output_dir / Path(each.name).stem if alone else each.folder for each in found]
    return list(zip(found, stems, strict=True))
