"""Surgery on torch.fx graphs: trace, facts, rules, flow, plan, rewrite, verify, in that order."""
