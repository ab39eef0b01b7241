"""What a training would take, in memory, time, storage and energy, before anything is loaded or spent."""

from veneer.planning.plan import MethodPlan, Plan, Request, plan

__all__ = ["MethodPlan", "Plan", "Request", "plan"]
