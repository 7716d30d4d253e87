package agent

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/overlayd/overlayd/netstate"
)

const (
	// bridgePatience is how long a loss must last to be one: the program that makes a bridge gives it its address a
	// moment later.
	bridgePatience = 3 * time.Second
	// bridgeEvery is how often the kernel is observed while something is lost: its events about ports that come back are
	// ignored.
	bridgeEvery, bridgeAtLeast = 5 * time.Second, 30 * time.Second
)

// podBridges is what the agent knows of the pods' bridges. It makes none, and changes none: it reports what another
// program took from them.
type podBridges struct {
	known []netstate.PodBridge
	lost  string    // what they have lost, as it is reported
	since time.Time // when it was lost
}

// gist is what is worth writing at once. Ports come and go with the pods.
func (b podBridges) gist() string {
	var out strings.Builder
	for _, k := range b.known {
		fmt.Fprint(&out, k.Name, k.Addrs)
	}
	return out.String() + b.lost
}

// followBridges checks whether the pods' bridges still have what they had. What they lack does not make the node not
// ready: it may be that no pod needs it.
func (a *Agent) followBridges(now time.Time) {
	b := &a.bridges
	known, losses := netstate.FollowBridges(b.known, a.facts.host, a.facts.subnets)
	var parts []string
	for _, l := range losses {
		parts = append(parts, l.String()+": "+l.Commands()[0])
	}
	lost := strings.Join(parts, "; ")
	if lost != "" && b.lost == "" {
		b.since = now
	}
	b.known, b.lost = known, lost
	if lost == "" {
		a.health.set(condBridge, nil)
		return
	}
	if early := b.since.Add(bridgePatience).Sub(now); early > 0 {
		a.rounds.WakeAfter(early)
	} else {
		a.health.set(condBridge, errors.New(lost))
	}
	// Less and less often: with many peers, to observe the whole kernel is expensive.
	a.observe.WakeAfter(max(bridgeEvery, min(now.Sub(b.since)/4, bridgeAtLeast)))
}
