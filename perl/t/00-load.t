use strict;
use warnings;

use Test::More;

my @modules = map { "CPANBridge$_" }
    '', qw(::Boolean ::Clock ::Connection ::Error ::Exchange ::JSON ::JSON::Decoder ::JSON::Encoder ::SocketPath);

for my $module (@modules) {
    require_ok($module);
    is($module->VERSION, '0.6.0', "the version of $module");
}
ok(!$INC{'JSON/PP.pm'},        'JSON::PP, which Perl 5.10 lacks, is not needed');
ok(!$INC{'Cpanel/JSON/XS.pm'}, 'a decoder in C is not loaded for small replies');

done_testing;
