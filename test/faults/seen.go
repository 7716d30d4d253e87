package faults

import "time"

// Seen is what an operator gets to see of a fault: on the victim, while it lasts, or after it was put right where that is done at
// once. When it is over, /readyz says ok again and the gauges are back.
type Seen struct {
	// Status is a regular expression for a line of `overlayd status` that was not there before.
	Status string
	// Doctor is one for a line of `overlayd doctor` that was not there before. It is run once, when the rest was seen.
	Doctor string
	// Ready is one for a line of /readyz, with the HTTP status in front: "^503 not ready: lease". Or it is NoAnswer. Empty: what the
	// fault breaks is put right, or gone round, before anybody can ask.
	Ready string
	// Metrics have to move: `overlayd_ready 0` is a gauge with the value that it has meanwhile, or "more" where only that it rises is
	// sure; `overlayd_drift_reverted_total{kind="route"} +` a counter that rises. Labels that are not named are summed up. `up 0` says,
	// as Prometheus does, that there are no metrics to be had.
	Metrics []string
	// Within is how long all that may take from the fault on; 0: seenSoon.
	Within time.Duration
}

const (
	// NoAnswer is what is read at /readyz where nobody answers.
	NoAnswer = "no answer"
	// seenSoon is more than a second, since the start of a command takes its time on a busy machine.
	seenSoon = 3 * time.Second
)

func (s *Seen) within() time.Duration {
	if s.Within == 0 {
		return seenSoon
	}
	return s.Within
}

// repairs is what is seen of drift: it is put right before anybody can ask, and told afterwards, with the object.
func repairs(kind, object string) *Seen {
	return &Seen{
		Status:  `(^|Drift )` + kind + `: \d+, last .*(` + object + `)`,
		Metrics: []string{`overlayd_drift_reverted_total{kind="` + kind + `"} +`},
	}
}

// degrades is what is seen of a fault that leaves the node ready: a problem with a reason.
func degrades(problem, reason string, metrics ...string) *Seen {
	return &Seen{
		Status:  `\b` + problem + `: .*(` + reason + `)`,
		Ready:   `^200 degraded: ` + problem + `: .*(` + reason + `)`,
		Metrics: append([]string{`overlayd_problem{name="` + problem + `",fatal="false"} 1`}, metrics...),
	}
}

// unreadies is what is seen of a fault with which a node is not ready.
func unreadies(problem, reason string) *Seen {
	return &Seen{
		Status:  `\b` + problem + `: .*(` + reason + `)`,
		Ready:   `^503 not ready: ` + problem + `: .*(` + reason + `)`,
		Metrics: []string{`overlayd_problem{name="` + problem + `",fatal="true"} 1`, `overlayd_ready 0`},
	}
}

// follows is what is seen of a change that the node follows: a line of the status, and metrics.
func follows(status string, metrics ...string) *Seen { return &Seen{Status: status, Metrics: metrics} }

// diagnosed adds what the doctor says.
func (s *Seen) diagnosed(pattern string) *Seen {
	s.Doctor = pattern
	return s
}

// in gives more time than usual.
func (s *Seen) in(d time.Duration) *Seen {
	s.Within = d
	return s
}
