"""Tasks with one right answer, and the score of a model on held-out items of them."""

from trine.evaluation.items import Item, Split, split_of
from trine.evaluation.scorer import evaluate, is_right
from trine.evaluation.tasks import TASKS, make_item, make_items

__all__ = ["TASKS", "Item", "Split", "evaluate", "is_right", "make_item", "make_items", "split_of"]
