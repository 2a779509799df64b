"""How good a model is: perplexity, distance between two models, lm-evaluation-harness.

>>> from phi_c.evaluate import perplexity
>>> with phi_c.load("smollm2") as llm:
...     print(perplexity(llm, text))
"""

from phi_c.evaluate.divergence import Bucket, Comparison, compare
from phi_c.evaluate.likelihood import Perplexity, perplexity

__all__ = ["Bucket", "Comparison", "Perplexity", "compare", "perplexity"]
