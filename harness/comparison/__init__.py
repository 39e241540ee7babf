"""Methods of quantization side by side on the same model and text, for the programs that measure them.

methods     what is compared: names, and the settings of a run
measure     an original, texts and windows; perplexity and divergence of what a method makes of it
speed       tokens per second of a model, dense or ternary
plots       the style of all plots, and SVG files that are the same at every run
"""
