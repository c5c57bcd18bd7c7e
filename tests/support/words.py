"""Command lines for tests: what most of a test's cases share, and what one has in its place."""


def instead(words, more):
    """`words` and then `more`, whose flags and keys take the place of those of `words`: no flag may have two values.

    A flag's value stands behind it or after its "=".
    """
    given, kept, is_kept = {word.partition("=")[0] for word in map(str, more) if word.startswith("--")}, [], True
    for word in map(str, words):
        if word.startswith("--"):
            is_kept = word.partition("=")[0] not in given
        if is_kept:
            kept.append(word)
    return [*kept, *more]
