"""VQA accuracy (arXiv 1505.00468): how many of the people who were asked gave the model's answer, three being enough.

Answers are compared after the normalisation of the official evaluation: punctuation, articles, number words and
contractions, in its order and with its tables, also where they are odd: `somebody'd` loses its apostrophe, a period
before a digit stays, and `-` goes or becomes a blank by what else is in the answer.

What may surprise: the official script normalises only where the people disagree, so that `Yes` is wrong where ten said
`yes`; here both are always normalised. It is made for ten answers; of fewer, so many of the others must agree as there
are, at most three, and a single answer has to be given.
"""

import re
from collections.abc import Sequence

from hf_llava_ft.evaluation.metrics.given import mean_metric

_ENOUGH = 3
_PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')
_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
_COMMA = re.compile(r"(\d)(\,)(\d)")
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBER_WORDS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBERS)}}
# As written, and as it is read.
_CONTRACTIONS = dict(
    pair.split(":")
    for pair in """
aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've couldnt've:couldn't've
didnt:didn't doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've hadn'tve:hadn't've hasnt:hasn't
havent:haven't hed:he'd hed've:he'd've he'dve:he'd've hes:he's howd:how'd howll:how'll hows:how's Id've:I'd've
I'dve:I'd've Im:I'm Ive:I've isnt:isn't itd:it'd itd've:it'd've it'dve:it'd've itll:it'll maam:ma'am
mightnt:mightn't mightnt've:mightn't've mightn'tve:mightn't've mightve:might've mustnt:mustn't mustve:must've
neednt:needn't notve:not've oclock:o'clock oughtnt:oughtn't ow's'at:'ow's'at 'ows'at:'ow's'at 'ow'sat:'ow's'at
shant:shan't shed've:she'd've she'dve:she'd've shouldve:should've shouldnt:shouldn't shouldnt've:shouldn't've
shouldn'tve:shouldn't've somebody'd:somebodyd somebodyd've:somebody'd've somebody'dve:somebody'd've
somebodyll:somebody'll somebodys:somebody's someoned:someone'd someoned've:someone'd've someone'dve:someone'd've
someonell:someone'll someones:someone's somethingd:something'd somethingd've:something'd've
something'dve:something'd've somethingll:something'll thats:that's thered:there'd thered've:there'd've
there'dve:there'd've therere:there're theres:there's theyd:they'd theyd've:they'd've they'dve:they'd've
theyll:they'll theyre:they're theyve:they've twas:'twas wasnt:wasn't wed've:we'd've we'dve:we'd've weve:we've
werent:weren't whatll:what'll whatre:what're whats:what's whatve:what've whens:when's whered:where'd wheres:where's
whereve:where've whod:who'd whod've:who'd've who'dve:who'd've wholl:who'll whos:who's whove:who've whyll:why'll
whyre:why're whys:why's wont:won't wouldve:would've wouldnt:wouldn't wouldnt've:wouldn't've wouldn'tve:wouldn't've
yall:y'all yall'll:y'all'll y'allll:y'all'll yall'd've:y'all'd've y'alld've:y'all'd've y'all'dve:y'all'd've
youd:you'd youd've:you'd've you'dve:you'd've youll:you'll youre:you're youve:you've
""".split()
)


def normalized(answer: str) -> str:
    """What the official evaluation compares."""
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    return _without_articles(_without_punctuation(text))


def _without_punctuation(text: str) -> str:
    found = text
    for mark in _PUNCTUATION:
        is_at_an_edge = f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if is_at_an_edge or _COMMA.search(text) else " ")
    return _PERIOD.sub("", found)


def _without_articles(text: str) -> str:
    words = (_NUMBER_WORDS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Of one row: the mean over the people of `min(1, others who gave this answer / 3)`."""
    said, given = normalized(answer), [normalized(reference) for reference in references]
    if len(given) == 1:
        return float(said == given[0])
    num_equal, enough = given.count(said), min(_ENOUGH, len(given) - 1)
    scores = [min(1.0, (num_equal - (each == said)) / enough) for each in given]
    return sum(scores) / len(scores)


VQA_ACCURACY = mean_metric("vqa_accuracy", "VQA accuracy", lambda row: vqa_accuracy(row.answer, row.references))
