"""The GPU's figures in one picture, `docs/images/speed.png`, from train_step.json and guide_gpu.json.

python benchmarks/chart.py

Needs: CPU; results of train_step and guide_gpu on one card; seconds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PEFT, OURS = "#9aa0a6", "#1a73e8"
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 11}


def bars(axes: Axes, title: str, unit: str, rows: list[tuple[str, float, str]]) -> None:
    names, values, colours = zip(*rows, strict=True)
    places = range(len(rows))
    axes.barh(places, values, color=colours, height=0.65)
    for place, value in zip(places, values, strict=True):
        text = f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
        axes.text(value, place, f" {text}", va="center")
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * max(values))
    axes.set_xlabel(unit)
    axes.set_title(title, loc="left", fontsize=12)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    found = json.loads((RESULTS / "train_step.json").read_text())
    rows = {(r["name"], r["batch"], r["length"], r["dtype"]): r for r in found["rows"]}
    guide = json.loads((RESULTS / "guide_gpu.json").read_text())["rows"]
    half = "bfloat16"
    card = found["machine"]["card"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(15, 4.2), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        step, memory, whole = figure.subplots(1, 3)
        bars(
            step,
            "A step of 8 PhraseBank sentences",
            "ms",
            [
                ("PEFT's guide\nfp32, padded to 128", rows["PEFT guide", 8, 128, "float32"]["ms"], PEFT),
                ("PEFT captured\nbf16, padded to 128", rows["PEFT captured", 8, 128, half]["ms"], PEFT),
                ("ia3 compile_step\nbf16, padded to 128", rows["ia3 compile_step", 8, 128, half]["ms"], OURS),
                (
                    "ia3, a loop of one's own\nwith the import changed",
                    rows["PEFT guide, import changed", 8, None, half]["ms"],
                    OURS,
                ),
                ("ia3 compile_step\nbf16, no padding", rows["ia3 compile_step", 8, None, half]["ms"], OURS),
            ],
        )
        bars(
            memory,
            "Memory of a step of 64 × 128, bf16",
            "MiB at the peak, weights included",
            [
                ("PEFT captured", rows["PEFT captured", 64, 128, half]["peak_mib"], PEFT),
                ("a gradient through\nthe frozen base", rows["frozen base", 64, 128, half]["peak_mib"], PEFT),
                ("ia3", rows["ia3 compile_step", 64, 128, half]["peak_mib"], OURS),
                ("ia3, recompute", rows["ia3 compile_step, recompute", 64, 128, half]["peak_mib"], OURS),
            ],
        )
        bars(
            whole,
            "The whole guide, 3 epochs",
            "s",
            [
                ("PEFT's guide\n(projected)", guide["PEFT guide"]["s"], PEFT),
                ("ia3, no kernel\ncompiled before", guide["ia3, cold"]["s"], OURS),
                ("ia3, from then on", guide["ia3, warm"]["s"], OURS),
            ],
        )
        figure.suptitle(f"mt0-large's shape on an {card}", x=0.005, ha="left", fontsize=13)
        figure.savefig(ROOT / "docs" / "images" / "speed.png")


if __name__ == "__main__":
    main()
