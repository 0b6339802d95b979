"""What a baseline raises."""


class Absent(Exception):
    """Why a baseline cannot compute a case."""
