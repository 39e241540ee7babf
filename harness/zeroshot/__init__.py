"""Zero-shot tasks through lm-eval: prompts, scoring and standard errors are its own.

    tasks       the seven tasks of the paper, from the hub or from local files
    measure     a loaded model in lm-eval; its accuracies, side by side with those of others

`measure` imports lm-eval; a program imports it only when tasks are asked for.
"""
