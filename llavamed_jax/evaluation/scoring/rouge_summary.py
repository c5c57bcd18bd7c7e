"""ROUGE-L as the package rouge 1.0.1 computes it (its `rouge-l`, F), which many report-generation toolkits print.

It is another number than rouge-score's (`captions.rouge_l`): texts are split at dots, words at blanks, with case and
punctuation; longest common subsequences are taken sentence by sentence; and everything is counted over distinct words.
"""

from collections.abc import Sequence

_EPSILON = 1e-8  # the package adds it to the denominator of F


def rouge_l_summary(prediction: str, reference: str) -> float:
    """Returns F, a fraction; 0 if one of the texts has no sentence, for which the package raises an error."""
    predicted, wanted = (_sentences(text) for text in (prediction, reference))
    if not predicted or not wanted:
        return 0.0
    found: set[str] = set()
    for sentence in wanted:
        for other in predicted:
            found |= _common(sentence.split(" "), other.split(" "))
    words = [{word for sentence in sentences for word in sentence.split(" ")} for sentences in (predicted, wanted)]
    precision, recall = (len(found) / len(each) for each in words)
    return 2 * precision * recall / (precision + recall + _EPSILON)


def _sentences(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split(".") if part]


def _common(first: Sequence[str], second: Sequence[str]) -> set[str]:
    """Returns the words of a longest common subsequence; of several, the one that the package finds."""
    table = [[0] * (len(second) + 1)]
    for word in first:
        above, row = table[-1], [0]
        for column, other in enumerate(second):
            row.append(above[column] + 1 if word == other else max(above[column + 1], row[column]))
        table.append(row)
    found, i, j = set(), len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            found.add(first[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found
