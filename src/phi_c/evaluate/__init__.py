"""Quality of a model: perplexity, KL divergence between two models, lm-evaluation-harness.

>>> with phi_c.load("smollm2") as llm:
...     print(phi_c.perplexity(llm, text))
"""

from phi_c.evaluate.divergence import Bucket, Comparison, compare
from phi_c.evaluate.likelihood import Perplexity, perplexity

__all__ = ["Bucket", "Comparison", "Perplexity", "compare", "perplexity"]
