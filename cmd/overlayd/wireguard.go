package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/overlayd/overlayd/agent/state"
)

func wireGuardKeyCommand(f *flags) *cobra.Command {
	renew := false
	cmd := &cobra.Command{
		Use: "wireguard-key", Args: noArgs,
		Short: "Print this node's public key of WireGuard, or make another one",
		Long: `Print this node's public key of WireGuard. The private key is in the state directory, which --state-dir
names; it is made when it is first needed. --renew makes another one, which the daemon uses and announces when it is
restarted.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.check(); err != nil {
				return err
			}
			dir := state.Dir{Path: f.agent.StateDir}
			read := dir.WireGuardKey
			if renew {
				read = dir.NewWireGuardKey
			}
			key, err := read()
			if err == nil {
				_, err = fmt.Fprintln(cmd.OutOrStdout(), key.Public())
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&renew, "renew", false, "Make another key in the place of the one that there is")
	return cmd
}
