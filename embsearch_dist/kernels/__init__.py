"""Compiled arithmetic for CPU, each beside the same in torch: Adam of rows, attention, products of the dense part."""
