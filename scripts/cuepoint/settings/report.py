"""Settings of the report."""

from pydantic import Field

from cuepoint.settings.base import Section


class ReportSettings(Section):
    """What the report shows."""

    gpu_hour_price: float | None = Field(None, ge=0)
    """Price of one GPU for an hour, in any currency: the report then says what 1,000 hours of audio cost."""
    core_hour_price: float | None = Field(None, ge=0)
    """Price of one CPU core for an hour; cores are counted for the time that they were busy."""
    ledger_rows: int = Field(2000, ge=0)
    """Videos in the report's table, those with problems first; `ledger.csv` and `ledger.parquet` have all."""
