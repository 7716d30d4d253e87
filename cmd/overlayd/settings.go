package main

import (
	"errors"
	"os"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/overlayd/overlayd/diag/doctor"
)

// defaultEnvFile is where the systemd unit has the daemon's settings (dist/systemd).
const defaultEnvFile = "/etc/overlayd/overlayd.env"

// envFile is the file that systemd makes the daemon's environment of. Commands read it as well: their environment is
// another one.
type envFile struct {
	path string
	vars map[string]string // nil: there is none
	err  error
}

// addEnvFile makes a command find the daemon's settings.
func (f *flags) addEnvFile(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().StringVar(&f.file.path, "env-file", defaultEnvFile,
		"Environment `file` of the daemon; optional")
	return cmd
}

// passwordEnv is a secret: the processes that overlayd starts, such as iptables, would inherit it.
const passwordEnv = "OVERLAYD_ETCD_PASSWORD"

// read puts the settings together: flags come before the environment, that before the file.
func (f *flags) read(cmd *cobra.Command) error {
	s := cmd.Flags()
	s.Visit(func(x *pflag.Flag) { f.given = append(f.given, x.Name) })
	f.unknown = unknownSettings(cmd.Root(), environment())
	if file := s.Lookup("env-file"); file != nil {
		if v, ok := os.LookupEnv(envName(file.Name)); ok && !file.Changed {
			f.file.path = v
		}
		f.file.vars, f.file.err = doctor.ReadEnvFile(f.file.path)
	}
	err := fromEnvironment(s, func(name string) (string, bool) {
		if v, ok := os.LookupEnv(name); ok {
			return v, true
		}
		v, ok := f.file.vars[name]
		return v, ok && isSetting(cmd.Root(), name)
	})
	f.owned = ownedFlags(s)
	return errors.Join(err, os.Unsetenv(passwordEnv))
}

// isSetting reports whether a variable is one of the daemon's settings.
func isSetting(root *cobra.Command, name string) bool {
	found := false
	for _, s := range []*pflag.FlagSet{root.Flags(), root.PersistentFlags()} {
		s.VisitAll(func(x *pflag.Flag) { found = found || envName(x.Name) == name })
	}
	return found
}

func environment() map[string]string {
	out := map[string]string{}
	for _, v := range os.Environ() {
		name, value, _ := strings.Cut(v, "=")
		out[name] = value
	}
	return out
}

// unknownSettings are the variables that are named like settings and are none: a typing error, or of another version.
// They cause a warning, not an error: with one file for all nodes, those whose overlayd is older would not start.
func unknownSettings(root *cobra.Command, vars map[string]string) []string {
	// Kubernetes gives such to pods for a Service whose name begins with ours.
	link := regexp.MustCompile(`_SERVICE_(HOST|PORT(_.*)?)=|_PORT=[a-z]+://|` +
		`_PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?=`)
	commands := append([]*cobra.Command{root}, root.Commands()...)
	var out []string
	for name, value := range vars {
		known := slices.ContainsFunc(commands, func(c *cobra.Command) bool { return isSetting(c, name) })
		if strings.HasPrefix(name, "OVERLAYD_") && !known && !link.MatchString(name+"="+value) {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

// settings are what doctor and all that need the store go by.
func (f *flags) settings() doctor.Settings {
	s := doctor.Settings{
		Store: f.store, Given: f.given,
		EnvFile: f.file.path, EnvFileErr: f.file.err,
		SubnetFile: f.agent.SubnetFile, StateDir: f.agent.StateDir, CNIConf: f.agent.CNIConf,
	}
	s.Identity, s.IdentityErr = f.identity()
	return s
}
