"""GPU clocks, power and temperature through NVML, while something is timed."""

from __future__ import annotations

from typing import Any

# Reasons that mean the chip is not in its normal state: thermal slowdowns and power brakes. The software
# power cap is not among them: large matrix products run against it all the time.
BAD_REASONS = {"hw_slowdown": 0x8, "sw_thermal": 0x20, "hw_thermal": 0x40, "power_brake": 0x80}
POWER_CAP = 0x4
# A clock under this share of the highest seen in the same measurement is throttled, whatever the reason.
SLOW_CLOCK = 0.75


class Telemetry:
    """Reads one GPU. Where NVML is missing, reads nothing and says so in `summary`.

    Args:
        index: of the GPU as torch counts them; NVML's own count ignores CUDA_VISIBLE_DEVICES.
    """

    def __init__(self, index: int = 0):
        self.readings: list[dict[str, float]] = []
        self.note: str | None = None
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            self._handle = _handle(pynvml, index)
        except Exception as problem:  # any NVML failure only costs us the telemetry
            self._nvml = None
            self.note = f"no NVML: {problem}"

    def read(self) -> dict[str, float] | None:
        """SM clock (MHz), power (W), temperature (°C) and throttle reasons (bits), or None."""
        if self._nvml is None:
            return None
        n, h = self._nvml, self._handle
        try:
            reading = {
                "sm_mhz": float(n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_SM)),
                "power_w": n.nvmlDeviceGetPowerUsage(h) / 1e3,
                "temperature_c": float(n.nvmlDeviceGetTemperature(h, n.NVML_TEMPERATURE_GPU)),
                "reasons": float(n.nvmlDeviceGetCurrentClocksThrottleReasons(h)),
            }
        except n.NVMLError as problem:
            self.note = f"NVML stopped answering: {problem}"
            return None
        self.readings.append(reading)
        return reading

    def other_processes(self) -> int | None:
        """Processes beside this one that compute on the GPU; None where NVML does not say."""
        if self._nvml is None:
            return None
        try:
            return max(0, len(self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)) - 1)
        except self._nvml.NVMLError:
            return None

    def summary(self) -> dict[str, Any]:
        """Minimum, median and maximum of each reading, and the share of readings at the power cap."""
        if not self.readings:
            return {"note": self.note} if self.note else {}
        out: dict[str, Any] = {}
        for name in ("sm_mhz", "power_w", "temperature_c"):
            values = sorted(r[name] for r in self.readings)
            out[name] = [values[0], values[len(values) // 2], values[-1]]
        capped = sum(int(r["reasons"]) & POWER_CAP != 0 for r in self.readings)
        out["at_power_cap"] = round(capped / len(self.readings), 3)
        out["readings"] = len(self.readings)
        if self.note:
            out["note"] = self.note
        return out


def throttled(reading: dict[str, float], fastest_mhz: float) -> bool:
    """Whether a reading shows a thermal slowdown, a power brake, or a clock far below `fastest_mhz`."""
    braked = any(int(reading["reasons"]) & bit for bit in BAD_REASONS.values())
    return braked or reading["sm_mhz"] < SLOW_CLOCK * fastest_mhz


def _handle(nvml: Any, index: int) -> Any:
    import torch

    uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
    try:
        return nvml.nvmlDeviceGetHandleByUUID(uuid)
    except nvml.NVMLError:  # a MIG slice, or an NVML that wants bytes
        return nvml.nvmlDeviceGetHandleByIndex(index)
