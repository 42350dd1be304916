"""The names of the tasks and of their figures, for those who must know them before torch is loaded."""

HEADLINES: dict[str, str] = {
    "wikitext": "word_perplexity",
    "lambada": "acc",
    "hellaswag": "acc_norm",
    "arc_easy": "acc_norm",
    "piqa": "acc_norm",
}
"""Every task with the figure by which it is told where there is room for one."""
TASK_NAMES = tuple(HEADLINES)
NOT_FIGURES = ("rows", "seconds", "cut", "stderr")
"""What a task's result says beside its figures; `stderr` is the headline's, which has its own as <name>_stderr too."""
LOSS = "loss"
"""The loss over a split (`evals/loss.py`), which the command line names beside them."""
