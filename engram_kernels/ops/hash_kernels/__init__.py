"""Kernels of ngram_hash: look-backs, mixes, remainders."""
