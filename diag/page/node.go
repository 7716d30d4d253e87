package page

import (
	"fmt"

	"github.com/overlayd/overlayd/diag/status"
)

// problem is a failed condition.
type problem struct {
	Name   string `json:"name"`
	Reason string `json:"reason"`
	Since  string `json:"since"`
	Word   string `json:"word"` // the state it puts the node in
	Fatal  bool   `json:"fatal,omitempty"`
}

// node is the state of the node in words.
type node struct {
	Name     string       `json:"name"`
	About    string       `json:"about"`
	State    string       `json:"state"` // ready, degraded, not-ready or unknown: a CSS class
	Word     string       `json:"word"`
	Say      string       `json:"say"`
	Network  string       `json:"network"` // problems with peers; empty: none
	Problems []problem    `json:"problems"`
	Restart  []string     `json:"restart"`
	Facts    []status.Row `json:"facts"`
	Mark     string       `json:"mark"` // changes when the list of peers may have changed
}

func unknownNode() node {
	return node{Name: "this node", State: "unknown", Word: "No answer", Say: "The values below are unknown."}
}

func nodeView(n status.Node) node {
	v := node{
		Name:  n.Name,
		About: fmt.Sprintf("id %s, overlayd %s, up %s", n.ID, n.Version, status.Ago(n.Now, n.Started)),
		State: "ready", Word: "Ready", Say: "Ready for pods.",
		Problems: []problem{}, Restart: n.Restart, Facts: n.Rows(),
		Mark: fmt.Sprint(n.Store.Revision, n.Peers, n.Probe.Answer, n.Probe.Lossy, n.Probe.SmallOnly, n.Probe.Silent),
	}
	for _, fatal := range []bool{true, false} { // those that make the node not ready come first
		for _, p := range n.Problems {
			if p.Fatal == fatal {
				v.Problems = append(v.Problems, problemView(n, p))
			}
		}
	}
	switch {
	case !n.Ready:
		v.State, v.Word, v.Say = "not-ready", "Not ready", "Pods cannot use this node."
	case len(n.Problems) > 0:
		v.State, v.Word, v.Say = "degraded", "Degraded", "Ready for pods, with problems."
	}
	if failing := n.FailingPeers(); failing != "" {
		v.Network = fmt.Sprintf("Of %d peers: %s.", n.Peers.Total, failing)
	}
	return v
}

func problemView(n status.Node, p status.Problem) problem {
	word := "degraded"
	if p.Fatal {
		word = "not ready"
	}
	return problem{
		Name: p.Name, Reason: status.Shorten(p.Reason, status.LongText), Word: word, Fatal: p.Fatal,
		Since: fmt.Sprintf("for %s, since %s", status.Ago(n.Now, p.Since), p.Since.Format("2006-01-02 15:04:05 MST")),
	}
}
