"""Dates as logs and the API write them, to the second: `settings.FORMAT_MODULE_PATH` names this package."""

DATE_FORMAT = "Y-m-d"
TIME_FORMAT = "H:i:s"
DATETIME_FORMAT = "Y-m-d H:i:s"
