"""Features: what the frozen part of the backbone makes of each record, computed once and kept.

Modules
-------
featureset   FeatureSet, the features of N records
extraction   extract, which computes them or finds them in the cache
cache        the files: written aside, checked, mapped into memory
"""

from fedhead.common.features.extraction import cache_key, extract
from fedhead.common.features.featureset import FeatureSet

__all__ = ["FeatureSet", "cache_key", "extract"]
