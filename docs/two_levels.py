"""Draws the picture of the front page, `docs/two_levels.png`."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(6.4, 2.4), layout="constrained")
axes.set(xlim=(0, 10), ylim=(0, 4))
axes.axis("off")
box = {"boxstyle": "round,pad=0.6", "linewidth": 1.2}
axes.text(5, 3.2, r"upper level:  $\min_x\ F(x, y^*(x))$", ha="center", va="center", fontsize=13,
          bbox={**box, "facecolor": "#dbe7f5", "edgecolor": "#33628f"})  # fmt: skip
axes.text(5, 0.7, r"lower level:  $y^*(x) = \arg\min_y\ f(x, y)$", ha="center", va="center", fontsize=13,
          bbox={**box, "facecolor": "#fbe8d3", "edgecolor": "#a9642a"})  # fmt: skip
arrow = {"arrowstyle": "-|>", "linewidth": 1.4, "color": "0.3"}
axes.annotate("", (3.2, 1.25), (3.2, 2.65), arrowprops=arrow)
axes.annotate("", (6.8, 2.65), (6.8, 1.25), arrowprops=arrow)
axes.text(3.0, 1.95, "x", ha="right", va="center", fontsize=13, style="italic")
axes.text(7.0, 1.95, r"$y^*(x)$ and $dF/dx$", ha="left", va="center", fontsize=13)
figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)
