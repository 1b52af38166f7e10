"""How the pictures look: colours, style, ticks and the names of axes."""

from __future__ import annotations

from ia3.training.task import TaskKind

# Okabe and Ito's palette: told apart with any kind of colour blindness, and in grey.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#9AA0A6"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#5F6368",
    "axes.labelcolor": "#3C4043",
    "xtick.color": "#3C4043",
    "ytick.color": "#3C4043",
    "grid.color": "#E8EAED",
    "figure.constrained_layout.w_pad": 0.12,
    "figure.constrained_layout.h_pad": 0.1,
}
LOSSES = {
    TaskKind.LABEL_WORDS: "cross-entropy (nats a label token)",
    TaskKind.GENERATION: "cross-entropy (nats an answer's token)",
    TaskKind.INSTRUCTIONS: "cross-entropy (nats a completion's token)",
    TaskKind.SEQUENCE_CLASSIFICATION: "cross-entropy (nats a text)",
    TaskKind.TOKEN_CLASSIFICATION: "cross-entropy (nats a word)",
}


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between two losses."""
    powers = range(-6, 6)
    return [tick for power in powers for tick in (10.0**power, 2 * 10.0**power, 5 * 10.0**power) if low <= tick <= high]
