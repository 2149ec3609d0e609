"""The exception that data preparation raises for every problem a user can fix."""


class DatasetError(RuntimeError):
    """A dataset could not be fetched, read, built or written.

    The message is one paragraph that names the offending value, what was expected
    and what to do about it; tools print it as it is, without a traceback.
    """
