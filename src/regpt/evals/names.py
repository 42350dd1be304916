"""The names of the tasks and of their figures, for those who must know them before torch is loaded."""

TASK_NAMES = ("wikitext", "lambada", "hellaswag", "arc_easy", "piqa")
LOSS = "loss"
"""The loss over a split (`evals/loss.py`), which the command line names beside them."""
HEADLINES = {
    "wikitext": "word_perplexity",
    "lambada": "acc",
    "hellaswag": "acc_norm",
    "arc_easy": "acc_norm",
    "piqa": "acc_norm",
}
"""The figure that stands for a task where there is room for one."""
NOT_FIGURES = frozenset(("rows", "seconds", "cut", "stderr"))
"""What else a task's values hold in JSON and logs; `stderr` is the headline's, once more."""
