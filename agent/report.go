package agent

import (
	"errors"
	"fmt"
	"strings"

	"go.uber.org/zap"

	"github.com/overlayd/overlayd/backend"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

// mostNamed bounds how many objects one message names; the rest is counted.
const mostNamed = 10

// few shortens a list for a message.
func few(names []string) string {
	if rest := len(names) - mostNamed; rest > 0 {
		return fmt.Sprintf("%s; and %d more", strings.Join(names[:mostNamed], "; "), rest)
	}
	return strings.Join(names, "; ")
}

func joined(problems []string) error {
	if len(problems) == 0 {
		return nil
	}
	return errors.New(few(problems))
}

func refusals(refused []subnet.Refusal) error {
	var out []string
	for _, r := range refused {
		out = append(out, fmt.Sprintf("lease %.100q of node %q is left out: %s", r.Key, r.Node, r.Reason))
	}
	return joined(out)
}

func failures(failed []netstate.Failure) error {
	var out []string
	for _, f := range failed {
		out = append(out, f.Error())
	}
	return joined(out)
}

// logChanges says what was done to the kernel: a line for each change while they are few, a count by kind otherwise.
func logChanges(log *zap.Logger, done []netstate.Change) {
	if len(done) == 0 {
		return
	}
	counts := map[string]int{}
	for _, c := range done {
		log.Debug("kernel changed", zap.Stringer("change", c))
		counts[c.Op.String()+" "+c.Kind()]++
	}
	log.Info("kernel state brought up to date", zap.Any("changes", counts))
}

// peerLog says which peers came, went, or are reached in another way than before.
type peerLog struct {
	log  *zap.Logger
	ways map[string]string
}

func (p *peerLog) note(ways []backend.Way) {
	now := make(map[string]string, len(ways))
	var lines []string
	for _, w := range ways {
		key := fmt.Sprintf("%s %s", w.Peer.Name(), w.Peer.Subnets.Get(w.Family))
		now[key] = fmt.Sprintf("%s to %s", w.Kind, w.Peer.PublicIP.Get(w.Family))
		if w.Reason != "" {
			now[key] += ": " + w.Reason
		}
		if old, ok := p.ways[key]; !ok {
			lines = append(lines, fmt.Sprintf("new: %s, %s", key, now[key]))
		} else if old != now[key] {
			lines = append(lines, fmt.Sprintf("changed: %s, %s (was %s)", key, now[key], old))
		}
	}
	for key := range p.ways {
		if _, ok := now[key]; !ok {
			lines = append(lines, "gone: "+key)
		}
	}
	p.ways = now
	if len(lines) > mostNamed {
		p.log.Info("peers changed", zap.Int("changes", len(lines)), zap.Int("peers", len(ways)), zap.Strings("some", lines[:mostNamed]))
		return
	}
	for _, l := range lines {
		p.log.Info("peer " + l)
	}
}
