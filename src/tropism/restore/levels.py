"""The five levels of invented detail, the same words for judges and for people."""

LEVELS = {
    1: "Nothing invented can be seen.",
    2: "Tiny differences, seen only when zoomed in; the meaning is unchanged.",
    3: "Clear differences in places; the main content is intact.",
    4: "At least one important thing is wrong: text, a face, what an object is, or how many there are.",
    5: "The scene or its main object means something else, or many things are wrong.",
}
"""Our wording; 1 is best."""
LOWEST, HIGHEST = 1, 5
