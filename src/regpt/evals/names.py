"""The names of the tasks, for those who must know them before torch is loaded."""

TASK_NAMES = ("wikitext", "lambada", "hellaswag", "arc_easy", "piqa")
LOSS = "loss"
"""The loss over a split (`evals/loss.py`), which the command line names beside them."""
