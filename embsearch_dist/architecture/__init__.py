"""Architectures of NASRec: what they are, the spaces they come from, their one form, their cost, how they are drawn."""
