"""itjax: instruction tuning on JAX. One example, from a row on disk to a gradient:

data/sources.py      a row on disk, addressable by number        -> row: dict
data/shapes.py       what a row's fields mean                    -> Conversation
data/phrase.py       phrasing: which words, which examples       -> Conversation
data/filters.py      kept, masked or dropped, with the reason    -> RowSource of what is left
data/gather.py       all of that, for every source of a config   -> rows to train on, rows held out
text/chat.py         roles and delimiters; what is to be learned -> segments (text, weight)
text/tokenizer.py    text to ids, specials exact                 -> token ids
data/encode.py       ids, shifted, cut by a named policy         -> TokenizedExample
data/cache.py        every example once, on disk                 -> memory-mapped arrays
data/recipe.py       weights, rates and stages of a config       -> shares at each step
data/mixture.py      which source comes next, and how often      -> order of (source, index)
data/pack.py         many examples, one row                      -> plan of rows
data/loader.py       rows to this host's batch, resumable        -> PackedBatch (numpy)
parallel/layout.py   names of axes to devices                    -> PackedBatch (global jax arrays)
hub/folder.py        a published model's files                   -> ModelConfig, parameters on their devices
models/decoder.py    tokens to features                          -> x_BTD
objectives/sft.py    features to summed loss and summed weight   -> LossSums
train/step.py        sums to gradient to new state               -> TrainState, Metrics
train/checkpoint.py  state and data position, together           -> disk
export.py            a checkpoint as others open it              -> a published model's files
"""

__version__ = "0.1.0"
