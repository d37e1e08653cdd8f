"""Models that call PyTorch's FlexAttention: what each call computes is observed, given a meaning, and proved.

`family` is the adapter. It runs the model with its calls sent elsewhere (`interception`), asks each call's functions
(`observation`, `mask_mods`, `score_mods`), compares several runs (`survey`, `meaning`), and computes the call as one
operator (`attend`), with block lists of its own where masks read the inputs (`documents`, `lists`).
"""
