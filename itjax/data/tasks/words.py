"""Small closed vocabularies that the families share, so that a small tokenizer has most words as one token."""

# fmt: off
NAMES = (
    "Mia", "Leo", "Anna", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Iris", "Jack", "Kira", "Liam",
    "Mona", "Nick", "Olga", "Paul", "Rosa", "Tom",
)
PRODUCTS = (
    "lamp", "chair", "phone", "watch", "radio", "camera", "printer", "kettle", "bike", "clock", "tent",
    "drill", "mixer", "router", "jacket", "sofa",
)
ITEMS = (
    "apples", "pens", "books", "coins", "cards", "stamps", "shells", "beads", "eggs", "cups", "nuts", "keys",
)
# fmt: on
