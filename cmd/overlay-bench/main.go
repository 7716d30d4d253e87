// Command overlay-bench measures overlayd and prints one table; see Documentation/performance.md.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/test/bench"
	"github.com/overlayd/overlayd/test/lab"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends it at once
	err := root().ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "overlay-bench:", err)
		os.Exit(1)
	}
}

func root() *cobra.Command {
	var quick bool
	var only, out string
	cmd := &cobra.Command{
		Use: "overlay-bench", Short: "Measure overlayd, and print one table", Args: cobra.NoArgs, SilenceUsage: true,
		SilenceErrors: true,
		RunE:          func(cmd *cobra.Command, _ []string) error { return measure(cmd.Context(), quick, only, out) },
	}
	cmd.Flags().BoolVar(&quick, "quick", false, "few samples; bounds on times are not judged")
	cmd.Flags().StringVar(&only, "only", "", "run the benchmarks whose names match this `regex`; nothing is written then")
	cmd.Flags().StringVar(&out, "out", "", "`directory` for latest.md and latest.json")
	cmd.CompletionOptions.DisableDefaultCmd = true
	cmd.AddCommand(&cobra.Command{
		Use: lab.EtcdCommand, Hidden: true, DisableFlagParsing: true,
		Run: func(_ *cobra.Command, args []string) { lab.EtcdMain(args) },
	}, &cobra.Command{
		Use: bench.HerdCommand, Hidden: true, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return bench.HerdMain(cmd.Context(), cmd.InOrStdin(), cmd.OutOrStdout())
		},
	})
	return cmd
}

func measure(ctx context.Context, quick bool, only, out string) error {
	if os.Geteuid() != 0 {
		return errors.New("it makes network namespaces: run it as root")
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	e := &bench.Env{
		Quick: quick, Overlayd: filepath.Join(filepath.Dir(self), "overlayd"),
		Progress: func(line string) { fmt.Fprintln(os.Stderr, line) },
	}
	version, err := exec.CommandContext(ctx, e.Overlayd, "version").Output()
	if err != nil {
		return fmt.Errorf("overlayd has to be beside this program (make build): %w", err)
	}
	var filter *regexp.Regexp
	if only != "" {
		if filter, err = regexp.Compile(only); err != nil {
			return fmt.Errorf("--only: %w", err)
		}
	}
	res, err := bench.Run(ctx, e, filter)
	res.Version = strings.TrimPrefix(strings.TrimSpace(string(version)), "overlayd ")
	fmt.Print(res.Table())
	if err != nil {
		return err
	}
	if out != "" && only == "" {
		if err := res.Write(out); err != nil {
			return err
		}
	}
	if failed := res.Failed(); len(failed) > 0 {
		return fmt.Errorf("%d of %d rows do not keep their bounds", len(failed), len(res.Rows))
	}
	return nil
}
