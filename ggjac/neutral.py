"""Prompts to calibrate with, where no others are given: `--calibrate neutral`."""

# Of unrelated subjects, none of which asks for a word in particular.
NEUTRAL = (
    "The weather was mild and the streets were",
    "He put the book back on the shelf and",
    "A large part of the work was done by",
    "We waited for the train in the",
    "The results of the study show that",
    "She asked him whether he would",
    "There is a small village near the",
    "In the early years of the century",
    "The company announced on Monday that it",
    "Please make sure that the door is",
    "They had been walking for hours when",
    "The committee will meet again next",
    "It is not clear why the",
    "My brother works in a",
    "The old house at the end of the road",
    "After dinner the children went to",
    "This recipe needs two cups of",
    "The price of oil rose again",
    "According to the report, many people",
    "For a long time nobody knew the",
)
