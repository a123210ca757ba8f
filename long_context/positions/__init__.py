"""Position schemes, one file each; `seqzoo.layers.position` has the catalogue."""

from seqzoo.layers.position import CATALOGUE as CATALOGUE
from seqzoo.layers.position import Position as Position
from seqzoo.layers.position import create_position as create_position
