from .digits_ladder import DigitsLadder as DigitsLadder
