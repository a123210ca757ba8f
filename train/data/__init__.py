"""Data modules: batches are plain dicts of tensors, and resume is exact to the sample."""

from seqzoo.train.data.base import Tokens as Tokens
from seqzoo.train.data.corpus import Corpus as Corpus
from seqzoo.train.data.hub import Hub as Hub
from seqzoo.train.data.labelled import Labelled as Labelled
from seqzoo.train.data.lra import LRA as LRA
from seqzoo.train.data.stdlib import Stdlib as Stdlib
from seqzoo.train.data.synthetic import Synthetic as Synthetic
from seqzoo.train.data.text import Text as Text
