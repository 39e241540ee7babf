"""Generate text: python -m harness.generate PATH --prompt TEXT, or a conversation with --chat.

Reading order:

    stops       texts that end an answer
    decode      one run of the model: prefill, decoding, what ends it, what is printed
    chat        the model's chat template; a conversation that keeps its history and its cache
    __main__    the command line
"""
