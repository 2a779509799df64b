"""Files with fewer bits per weight: type mixes, importance matrices, and the quantiser."""
