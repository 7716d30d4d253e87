package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/overlayd/overlayd/agent"
	"github.com/overlayd/overlayd/agent/state"
	"github.com/overlayd/overlayd/internal/atomicfile"
	"github.com/overlayd/overlayd/masquerade"
	"github.com/overlayd/overlayd/masquerade/ipset"
	"github.com/overlayd/overlayd/netstate"
)

func cleanupCommand(f *flags) *cobra.Command {
	return &cobra.Command{
		Use: "cleanup", Args: noArgs,
		Short: "Remove everything that overlayd created on this node",
		Long: `Remove everything that overlayd created on this node: devices, routes, rules, firewall chains, ipsets,
the subnet file and the persisted state. The daemon must be stopped. The lease in the store stays: in etcd until it
expires, in Kubernetes as annotations of the Node. Sysctls such as ip_forward stay.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.check(); err != nil {
				return err
			}
			if err := needPrivileges(); err != nil {
				return err
			}
			unlock, err := agent.Lock(lockName, lockPatience)
			if errors.Is(err, agent.ErrRunning) {
				return fmt.Errorf("%w: stop it first", err)
			}
			if err != nil {
				return err
			}
			defer unlock()
			out := cmd.OutOrStdout()
			return errors.Join(
				cleanKernel(out),
				masquerade.Remove(cmd.Context(), ipset.New()),
				cleanFiles(out, append(state.Files(f.agent.StateDir), f.agent.SubnetFile)...),
			)
		},
	}
}

// cleanKernel makes the empty state the kernel's.
func cleanKernel(out io.Writer) error {
	k, err := netstate.Open(agent.OwnsDevice)
	if err != nil {
		return err
	}
	defer k.Close()
	res, err := k.Reconcile(netstate.Update{All: true, Prune: true})
	for _, c := range res.Done {
		_, _ = fmt.Fprintln(out, c)
	}
	for _, f := range res.Failed {
		err = errors.Join(err, f)
	}
	return err
}

func cleanFiles(out io.Writer, paths ...string) error {
	var errs []error
	for _, p := range paths {
		atomicfile.RemoveLeftovers(p)
		switch err := os.Remove(p); {
		case err == nil:
			_, _ = fmt.Fprintln(out, "delete file", p)
		case !errors.Is(err, os.ErrNotExist):
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
