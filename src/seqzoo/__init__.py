"""seqzoo: every sequence mixer swappable for every other, on CPU and GPU."""

from seqzoo.layers import create_mixer as create_mixer
from seqzoo.layers import list_mixers as list_mixers
from seqzoo.layers import mixer_info as mixer_info
