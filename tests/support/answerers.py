"""A base of answerers that stand in for a model: it states nothing about itself."""


class StandIn:
    """`evaluation.answering.answerer.Answerer` without `answers`."""

    name, model = "stand-in", None

    def facts(self):
        return {}

    def describe(self):
        return {}

    def depends_on(self):
        return {}

    def machine(self):
        return {}
