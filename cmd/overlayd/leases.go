package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/subnet"
)

// leaseRow is one line of `overlayd leases`, and one element of its JSON.
type leaseRow struct {
	Subnets     []netip.Prefix `json:"subnets"`
	Node        string         `json:"node,omitempty"`
	NodeID      string         `json:"nodeID,omitempty"`
	PublicIPs   []netip.Addr   `json:"publicIPs,omitempty"`
	Backend     string         `json:"backend,omitempty"`
	VtepMACs    []string       `json:"vtepMACs,omitempty"`
	PublicKey   string         `json:"publicKey,omitempty"` // of WireGuard
	Expires     *time.Time     `json:"expires,omitempty"`   // absent: a reservation, or as long as there is the Node
	Reservation bool           `json:"reservation"`
	Mine        bool           `json:"mine"`
	Key         string         `json:"key"`
	Error       string         `json:"error,omitempty"` // why it is of no use

	ofNode bool // it lasts as long as its Node in Kubernetes
}

func leasesCommand(f *flags) *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use: "leases", Short: "List the subnet leases in the store", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "table" && output != "json" {
				return usageError{fmt.Errorf("--output: expected table or json, found %q", output)}
			}
			rows, harmful, err := f.listLeases(cmd.Context())
			if err != nil {
				return err
			}
			for _, key := range harmful {
				_, _ = fmt.Fprintf(cmd.ErrOrStderr(), "warning: the value of %q is not JSON, which makes the flannel nodes "+
					"of this network drop all their peers: put '{}' instead, and restart flanneld on them\n", key)
			}
			if output == "json" {
				return printJSON(cmd.OutOrStdout(), rows)
			}
			return printLeases(cmd.OutOrStdout(), rows, time.Now())
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "table", "Output `format`: table or json")
	return f.addEnvFile(cmd)
}

// listLeases also lists the keys that harm flannel's nodes.
func (f *flags) listLeases(ctx context.Context) (rows []leaseRow, harmful []string, err error) {
	store, id, err := f.openStore(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer store.Close()
	table, err := store.List(ctx)
	if err != nil {
		return nil, nil, err
	}
	var expiries map[int64]time.Duration
	expiring, expire := store.(interface {
		Expiries(ctx context.Context, t subnet.Table) (map[int64]time.Duration, error)
	})
	if expire {
		if expiries, err = expiring.Expiries(ctx, table); err != nil {
			return nil, nil, err
		}
	}
	rows = make([]leaseRow, 0, len(table.Entries)) // not null in JSON
	for _, e := range table.Entries {
		r := rowOf(e, !expire)
		r.Mine = e.Identity == id && id.NodeID != ""
		if t, ok := expiries[e.LeaseID]; ok {
			r.Expires = new(time.Now().Add(t).Round(time.Second))
		}
		rows = append(rows, r)
	}
	for _, e := range table.HarmsFlannel() {
		harmful = append(harmful, e.Key)
	}
	return rows, harmful, nil
}

func rowOf(e *subnet.Entry, ofNode bool) leaseRow {
	r := leaseRow{
		PublicKey: string(e.PublicKey),
		Node:      e.NodeName, NodeID: e.NodeID, Backend: string(e.Backend), Reservation: e.Reserved() && !ofNode, Key: e.Key,
		ofNode: ofNode,
	}
	for _, f := range addr.Families() {
		if p := e.Subnets.Get(f); p.IsValid() {
			r.Subnets = append(r.Subnets, p)
		}
		if ip := e.PublicIP.Get(f); ip.IsValid() {
			r.PublicIPs = append(r.PublicIPs, ip)
		}
		if v := e.VTEP.Get(f); v != (subnet.VTEP{}) {
			r.VtepMACs = append(r.VtepMACs, v.MAC.String())
		}
	}
	if e.Err != nil {
		r.Error = strings.ReplaceAll(e.Err.Error(), "\n", "; ")
	}
	return r
}

func printLeases(out io.Writer, rows []leaseRow, now time.Time) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(w, "SUBNET\tNODE\tPUBLIC IP\tBACKEND\tVTEP MAC OR KEY\tEXPIRES IN\tOWNER")
	for _, r := range rows {
		name := fmt.Sprintf("%.64q", r.Key) // a key that can't be read is shown as it is, but harmless to a terminal
		if r.Error == "" {
			name = join(r.Subnets)
		}
		_, _ = fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n",
			name, dash(r.Node), dash(join(r.PublicIPs)), dash(r.Backend),
			dash(cmp.Or(r.PublicKey, join(r.VtepMACs))), r.expiry(now), r.whose())
	}
	return w.Flush()
}

func (r leaseRow) expiry(now time.Time) string {
	switch {
	case r.ofNode:
		return "with its Node"
	case r.Reservation:
		return "never"
	case r.Expires == nil:
		return "now"
	}
	return r.Expires.Sub(now).Round(time.Second).String()
}

func (r leaseRow) whose() string {
	switch {
	case r.Error != "":
		return "invalid: " + r.Error
	case r.Mine:
		return "mine"
	case r.ofNode && len(r.PublicIPs) == 0:
		return "not announced"
	case r.Node == "" && len(r.PublicIPs) == 0:
		return "reserved"
	}
	return "other"
}

func join[T any](list []T) string {
	parts := make([]string, 0, len(list))
	for _, x := range list {
		parts = append(parts, fmt.Sprint(x))
	}
	return strings.Join(parts, ",")
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
