"""Attention modules of families whose own attention does not go through transformers' `AttentionInterface`.

Each is the family's own class with another `forward`: the same projections and cache, and transformers' attention function in place
of the arithmetic written out by hand. A swap sets it as the class of the model's modules, and a restore sets the family's own again.
They are imported when a model of the family is swapped.
"""
